"""Muon for the weight matrices inside the layers, AdamW for all else, as one optimiser that the
Trainer takes.
"""

import torch


class MuonAdamW(torch.optim.Optimizer):
    """Muon (K. Jordan 2024; `torch.optim.Muon`) for the weight matrices inside the layers of
    `model`, AdamW for all else, embeddings and position biases among it. `muon` and
    `learning_rate`: their initial learning rates. `weight_decay` is that of the matrices: what
    AdamW has left, embeddings, norms and biases, is not decayed. `beta2`: AdamW's decay of the
    squared gradients.
    """

    def __init__(
        self, model, muon: float, learning_rate: float, weight_decay: float, beta2: float = 0.999
    ):
        inside = {
            id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Linear)
        }
        inside -= {id(model.get_output_embeddings().weight)}  # tied to the embeddings or not
        trained = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in trained if id(p) in inside]
        others = [p for p in trained if id(p) not in inside]
        self.parts = (
            torch.optim.AdamW(
                others, lr=learning_rate, betas=(0.9, beta2), weight_decay=0.0, fused=True
            ),
            torch.optim.Muon(matrices, lr=muon, weight_decay=weight_decay),
        )
        super().__init__([*others, *matrices], {})
        # Theirs: what a schedule sets, they use
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure=None):
        loss = closure() if closure is not None else None
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self):
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict):
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
