"""The projector: maps the LLM's hidden states into the SLM's embedding space."""

from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llm2slm_export.authoring.composition import PROJECTOR_FILE, ProjectorEntry
from llm2slm_export.errors import CompositionError

_EPSILON = 1e-6  # of the layer fusion's RMSNorm


class LayerFusion(nn.Module):
    """Learned fusion of several layers: RMSNorm(Σ sigmoid(weight_i) · H_i) (as in LaMaTE, arXiv 2503.06594)."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = layers
        self.weight = nn.Parameter(torch.zeros(layers))
        self.norm = nn.RMSNorm(width, eps=_EPSILON)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[batch, prompt, layers · width], layers concatenated → [batch, prompt, width]."""
        by_layer = hidden_states.view(*hidden_states.shape[:2], self.layers, -1)  # [batch, prompt, layers, width]
        fused: Tensor = self.norm((by_layer * torch.sigmoid(self.weight)[:, None]).sum(dim=2))
        return fused


class Projector(nn.Module):
    """Z = fc_out(relu(fc_in(H))): [batch, prompt, d_in] → [batch, prompt, d_out] (arXiv 2402.16844, §3).

    `ProjectorEntry` documents `identity`, `layers` and `d_embedding`.

    Args:
        entry: kind and widths.
        start: initialization of the output layer. `zero`: with `add`, the untrained pair equals the SLM; `random`:
            torch's default for linear layers.
    """

    def __init__(self, entry: ProjectorEntry, *, start: Literal["zero", "random"] = "zero") -> None:
        super().__init__()
        self.entry = entry
        self.layer_fusion = LayerFusion(entry.layers, entry.d_in) if entry.layers > 1 else None
        if entry.kind == "mlp":
            assert entry.d_hidden is not None  # the entry has been validated
            self.fc_in = nn.Linear(entry.d_in, entry.d_hidden)
            self.fc_out = nn.Linear(entry.d_hidden, entry.d_out)
            if start == "zero":
                nn.init.zeros_(self.fc_out.weight)
                nn.init.zeros_(self.fc_out.bias)
        self.adapter = nn.Linear(entry.d_embedding, entry.d_out) if entry.d_embedding is not None else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Project hidden states [batch, prompt, layers · d_in] to Z [batch, prompt, d_out]."""
        fused = hidden_states if self.layer_fusion is None else self.layer_fusion(hidden_states)
        if self.entry.kind == "identity":
            return fused
        projected: Tensor = self.fc_out(torch.relu(self.fc_in(fused)))
        return projected


def save_projector(projector: Projector, directory: Path, dtype: torch.dtype) -> None:
    """Save a projector into a composition, in the given type."""
    weights = {name: tensor.to(dtype).contiguous() for name, tensor in projector.state_dict().items()}
    save_file(weights, directory / PROJECTOR_FILE)


def load_projector(directory: Path, entry: ProjectorEntry) -> Projector:
    """Load a composition's projector in float32.

    Raises:
        CompositionError: the file is missing or damaged, or tensor names or shapes differ from composition.json. The
            message lists every difference.
    """
    path = directory / PROJECTOR_FILE
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CompositionError(
            f"{path} cannot be read.", str(error), remedy="restore the file, or train the composition again"
        ) from error
    projector = Projector(entry)
    expected = {name: tuple(tensor.shape) for name, tensor in projector.state_dict().items()}
    got = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if got != expected:
        raise CompositionError(
            f"{path} does not match composition.json.",
            *(
                f"{name}: expected {expected.get(name, 'no such tensor')}, got {got.get(name, 'nothing')}"
                for name in sorted(expected.keys() | got.keys())
                if expected.get(name) != got.get(name)
            ),
            remedy="use the projector file and the composition.json of one training run",
        )
    projector.load_state_dict({name: tensor.float() for name, tensor in found.items()})
    return projector
