"""The projector: what maps the LLM's hidden states into the SLM's embedding space."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llm2slm_export.composition import PROJECTOR_FILE, ProjectorEntry
from llm2slm_export.errors import CompositionError


class Projector(nn.Module):
    """Z = fc_out(relu(fc_in(H))): [batch, prompt, d_in] → [batch, prompt, d_out] (arXiv 2402.16844, §3).

    The output layer starts at zero, so that with `add` an untrained pair is the SLM alone, exactly.
    """

    def __init__(self, d_in: int, d_hidden: int, d_out: int) -> None:
        super().__init__()
        self.fc_in = nn.Linear(d_in, d_hidden)
        self.fc_out = nn.Linear(d_hidden, d_out)
        nn.init.zeros_(self.fc_out.weight)
        nn.init.zeros_(self.fc_out.bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        projected: Tensor = self.fc_out(torch.relu(self.fc_in(hidden_states)))
        return projected

    @property
    def entry(self) -> ProjectorEntry:
        return ProjectorEntry(
            d_in=self.fc_in.in_features, d_hidden=self.fc_in.out_features, d_out=self.fc_out.out_features
        )


def save_projector(projector: Projector, directory: Path, dtype: torch.dtype) -> None:
    weights = {name: tensor.to(dtype).contiguous() for name, tensor in projector.state_dict().items()}
    save_file(weights, directory / PROJECTOR_FILE)


def load_projector(directory: Path, entry: ProjectorEntry) -> Projector:
    """Load the projector of a composition, in float32.

    Raises:
        CompositionError: the file is missing or damaged, or a tensor's name or shape is not what composition.json says;
            every misfit is named.
    """
    path = directory / PROJECTOR_FILE
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CompositionError(
            f"{path} cannot be read.", str(error), remedy="restore the file, or train the composition again"
        ) from error
    projector = Projector(entry.d_in, entry.d_hidden, entry.d_out)
    expected = {name: tuple(tensor.shape) for name, tensor in projector.state_dict().items()}
    got = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if got != expected:
        raise CompositionError(
            f"{path} does not fit composition.json.",
            *(
                f"{name}: expected {expected.get(name, 'no such tensor')}, got {got.get(name, 'nothing')}"
                for name in sorted(expected.keys() | got.keys())
                if expected.get(name) != got.get(name)
            ),
            remedy="the projector's file and composition.json must come from the same training run",
        )
    projector.load_state_dict({name: tensor.float() for name, tensor in found.items()})
    return projector
