"""Result files: rows, reader, writer, shards, and the protocol beside them."""
