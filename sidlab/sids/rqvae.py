"""RQ-VAE: item embeddings → semantic IDs by a residual quantiser inside a small autoencoder.

The SID encoder of TIGER (arXiv 2305.05065): an MLP maps an embedding to a latent, each level
quantises what the levels before left of it, and a second MLP maps the sum of the codes back. The
quantiser is `ResidualVQ` of vector-quantize-pytorch: codebooks follow their latents by moving
averages, gradients pass by the rotation trick (arXiv 2410.06424).
"""

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sidlab.checks import from_extra
from sidlab.sids.encoder import SidEncoder, checked, nearest, residual_codes
from sidlab.sids.residual_kmeans import ResidualKMeans

# Latents per code that the codebooks are started from and looked through for dead codes
SAMPLE = 64
REVIVALS = 20  # in as many steps as a fit has; its first half has no codes yet


class RQVAE(SidEncoder):
    """fit(embeddings) → self, encode(embeddings) → codes, decode(codes) → embeddings.

    Args: `levels` L; `width`: codes per level, an int or one int per level (`widths` afterwards);
    `seed`: equal seeds give equal codebooks; `hidden`: sizes of the layers between embedding and
    latent, mirrored on the way back; `latent`: its size; `steps` of AdamW, each on `batch` random
    embeddings (at least the largest width) through all levels at once. The first half trains the
    autoencoder alone, then residual k-means starts the codebooks: started untrained, as in TIGER,
    it needs far more steps.

    Embeddings are centred and divided by one number, their root mean square. Dead codes are revived
    on the way; `dead_codes_` counts what is left of them. After fit: `codebooks_`, L float32 arrays
    [W_l, latent].
    """

    stem = "rqvae"

    def __init__(
        self,
        levels: int = 3,
        width=256,
        seed: int = 0,
        *,
        hidden=(512, 256, 128),
        latent: int = 32,
        steps: int = 2000,
        batch: int = 256,
    ):
        super().__init__(
            levels, width, seed, hidden=tuple(hidden), latent=latent, steps=steps, batch=batch
        )

    def _fit(self, x):
        # Here, since it is slow to import: a saved encoder doesn't need it.
        with from_extra("research"):
            from vector_quantize_pytorch import ResidualVQ

        mean = x.mean(axis=0, dtype=np.float64).astype(np.float32)
        scale = np.sqrt(np.square(x - mean).mean()) or np.float32(1)
        data = torch.from_numpy((x - mean) / scale)
        sizes = (x.shape[1], *self.hidden, self.latent)
        width = max(self.widths)
        batch = min(len(data), max(self.batch, width))
        rng = np.random.default_rng(self.seed)

        def sample(encoder):
            return encoder(data[rng.permutation(len(data))[: SAMPLE * width]]).detach().numpy()

        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(self.seed)
            encoder = _mlp(sizes)
            decoder = _mlp(sizes[::-1])
            # With the library's eps the rarest codes, their counts fading, would shrink to zero
            # between two uses.
            quantiser = ResidualVQ(
                dim=self.latent,
                codebook_size=self.widths,
                decay=0.97,
                eps=1e-10,
                commitment_weight=0.25,
            )
            optimiser = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()], lr=3e-3)
            rate = torch.optim.lr_scheduler.LambdaLR(
                optimiser, lambda s: min((s + 1) / 20, 1 - 0.95 * s / self.steps)
            )
            half = self.steps // 2
            every = max(1, self.steps // REVIVALS)
            for step in range(self.steps):
                if step == half:
                    start = ResidualKMeans(self.levels, self.widths, self.seed)._fit(
                        checked(sample(encoder))
                    )[0]
                    for layer, book in zip(quantiser.layers, start):
                        layer._codebook.embed[0] = layer._codebook.embed_avg[0] = torch.from_numpy(
                            book
                        )
                rows = data[torch.randint(len(data), (batch,))]
                latent = encoder(rows)
                coded, _, commitment = (
                    quantiser(latent) if step >= half else (latent, None, torch.zeros(1))
                )
                # Per variance: a free latent is large, and would shrink onto few codes for the sake
                # of the commitment alone.
                spread = latent.detach().var(correction=0).clamp(min=1e-12)
                loss = F.mse_loss(decoder(coded), rows) + commitment.sum() / spread
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                rate.step()
                # The last time after the last step
                if step >= half and (self.steps - 1 - step) % every == 0:
                    _revive(quantiser, sample(encoder), rng)
        weights = nn.ModuleDict({"encoder": encoder, "decoder": decoder}).state_dict()
        arrays = {name: tensor.numpy() for name, tensor in weights.items()} | {
            "mean": mean,
            "scale": np.atleast_1d(scale),
        }
        return [layer.codebook.numpy().copy() for layer in quantiser.layers], arrays

    def _encode(self, x):
        return residual_codes(
            self._apply("encoder", (x - self._arrays["mean"]) / self._arrays["scale"]),
            self.codebooks_,
        )

    def _decode(self, codes):
        latent = sum(book[column] for book, column in zip(self.codebooks_, codes.T))
        return self._apply("decoder", latent) * self._arrays["scale"] + self._arrays["mean"]

    def _apply(self, name, x):
        """The MLP `name` in numpy, so that encoding needs no module and no mode."""
        for layer in range(0, 2 * len(self.hidden) + 1, 2):  # a ReLU stands between two layers
            x = np.maximum(x, 0) if layer else x
            x = x @ self._arrays[f"{name}.{layer}.weight"].T + self._arrays[f"{name}.{layer}.bias"]
        return x


def _mlp(sizes) -> nn.Sequential:
    layers = [part for pair in itertools.pairwise(sizes) for part in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def _revive(quantiser, residual, rng) -> None:
    """Moves each code that none of the latents `residual` [n, latent] has to one that is far from
    its own code. (The library's revival draws from all latents alike, so many equal items keep
    taking the codes in vain.)
    """
    for layer in quantiser.layers:
        book = layer.codebook.numpy()  # shares its memory with the codebook
        code = nearest(residual, book)
        error = np.square(residual - book[code]).sum(axis=1, dtype=np.float64)
        dead = np.setdiff1d(np.arange(len(book)), code)
        if len(dead) and error.any():
            places = residual[rng.choice(len(residual), len(dead), p=error / error.sum())]
            layer._codebook.embed[0, dead] = layer._codebook.embed_avg[0, dead] = torch.from_numpy(
                places
            )
            layer._codebook.cluster_size[0, dead] = 1
        residual = residual - book[nearest(residual, book)]
