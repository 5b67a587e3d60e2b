"""Certify a network of your own, in memory: a notebook as a script (open it in an editor that knows `# %%` cells, or run it).

python examples/python_api.py
"""

# %% scikit-learn's digits: 1,797 grey images of 8x8 pixels, here in [0, 1]
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import rscli
from rscli.errors import InputError
from rscli.stats import metrics, paired

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)  # (1797, 1, 8, 8)
labels = torch.tensor(digits.target)
test = torch.arange(len(images)) % 5 == 0
names = [str(digit) for digit in range(10)]


# %% any training will do: plain torch, once without noise and once with the noise that certification will use
def network(sigma: float) -> nn.Module:
    """A small network, trained for ten epochs under Gaussian noise of standard deviation `sigma`."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    x, y = images[~test], labels[~test]
    for _ in range(10):
        for batch in torch.randperm(len(x)).split(128):
            noisy = x[batch] + sigma * torch.randn_like(x[batch])
            loss = nn.functional.cross_entropy(model(noisy), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


plain, augmented = network(0.0), network(0.25)

# %% a smoothed classifier: the network, its noise, the names of its classes
smoothed = {
    "plain": rscli.SmoothedClassifier(plain, sigma=0.25, class_names=names),
    "augmented": rscli.SmoothedClassifier(augmented, sigma=0.25, class_names=names),
}

# %% certify: a class for each image, and the L2 radius in which it provably cannot change
some, truth = images[test][:50], labels[test][:50].numpy()
certificates = {name: model.certify(some, n=2_000) for name, model in smoothed.items()}
first = certificates["augmented"][0]
radius = metrics.round_down(first.radius, 3)
print(
    f"image 0 is a {first.predict}, as {first.counts[first.predict]} of {first.n} samples say; no change shorter than {radius}"
)
print("makes the smoothed classifier answer otherwise; 1 in 1,000 such statements may be wrong")

# %% the field's figures, and a paired difference with its interval
radii = {name: np.array([c.radius for c in found]) for name, found in certificates.items()}
correct = {name: np.array([c.predict for c in found]) == truth for name, found in certificates.items()}
for name in smoothed:
    accuracy = metrics.certified_accuracy(radii[name], correct[name], [0.0, 0.25, 0.5])
    print(f"{name:<10} ACR {metrics.acr(radii[name], correct[name]):.3f}, certified at 0, 0.25, 0.5: {accuracy}")
gain = paired.compare_acr(radii["augmented"], correct["augmented"], radii["plain"], correct["plain"])
print(f"augmented minus plain: ACR {gain.difference:+.3f}, 95 % interval [{gain.low:+.3f}, {gain.high:+.3f}]")

# %% the same question, cheaper: is it certified at these radii? (any certifier that is installed)
decided = smoothed["augmented"].certify(some, n=2_000, certifier="sequential", radii=[0.25, 0.5])
print(f"sequential: {sum(c.n for c in decided):,} samples in place of {50 * 2_000:,}")

# %% predict: the class without a radius, or an abstention where the vote is too close
answers = smoothed["augmented"].predict(some[:5], n=200)
print("predicted:", [answer.name for answer in answers])


# %% ensembles, denoisers and the like are networks, too: plain modules that take pixels in [0, 1] and give logits
class Ensemble(nn.Module):
    """The mean of the members' logits."""

    def __init__(self, *members: nn.Module) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes)."""
        return torch.stack([member(x) for member in self.members]).mean(0)


class Denoiser(nn.Module):
    """The best linear denoiser of the training images (Wiener's): for a classifier that was never trained under noise."""

    def __init__(self, clean: torch.Tensor, sigma: float) -> None:
        super().__init__()
        covariance = torch.cov(clean.flatten(1).T)
        self.register_buffer("mean", clean.flatten(1).mean(0))
        self.register_buffer("gain", covariance @ torch.linalg.inv(covariance + sigma**2 * torch.eye(len(covariance))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images of the same shape."""
        return (self.mean + (x.flatten(1) - self.mean) @ self.gain.T).reshape(x.shape)


for title, module in (
    ("ensemble", Ensemble(augmented, network(0.25))),
    ("denoised", nn.Sequential(Denoiser(images[~test], 0.25), plain)),
):
    found = rscli.SmoothedClassifier(module, sigma=0.25, class_names=names).certify(some, n=2_000)
    acr = metrics.acr(np.array([c.radius for c in found]), np.array([c.predict for c in found]) == truth)
    print(f"{title:<10} ACR {acr:.3f}")

# %% bad input is answered as on the command line: one message, and what to do
try:
    smoothed["augmented"].certify(some * 255, n=2_000)
except InputError as error:
    print(f"refused: {error}")
