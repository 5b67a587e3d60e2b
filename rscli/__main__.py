"""`python -m rscli` (and so `torchrun -m rscli`)."""

from rscli.cli.app import main

if __name__ == "__main__":
    main()
