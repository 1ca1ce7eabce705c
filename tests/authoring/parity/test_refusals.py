"""The refusals of graphs that do not match the reference."""

from collections.abc import Callable, Mapping

import pytest

from llm2slm_export.authoring.parity.refusals import require_engine_parity, require_parity
from llm2slm_export.bundle.parity_report import ParityError, ParityReport
from llm2slm_export.contract import GraphName
from tests.support.small_bundle import parity_row

INT4: Mapping[GraphName, str] = {"encoder": "fp32", "projector": "fp32", "decoder": "int4"}


@pytest.mark.parametrize("require", [require_parity, require_engine_parity])
def test_a_report_without_comparisons_is_refused(require: Callable[..., None]) -> None:
    with pytest.raises(ParityError, match=r"would not|does not") as caught:
        require(ParityReport(rows=()), INT4)
    assert "match the composition: nothing was compared." in str(caught.value)
    assert caught.value.remedy.endswith("; report this pair")


@pytest.mark.parametrize("require", [require_parity, require_engine_parity])
def test_a_report_whose_comparisons_passed_is_accepted(require: Callable[..., None]) -> None:
    require(ParityReport(rows=(parity_row(),)), INT4)


def test_the_remedy_names_the_reduced_precisions_and_the_highest() -> None:
    with pytest.raises(ParityError) as caught:
        require_parity(ParityReport(rows=(parity_row(), parity_row("decoder", value=1.0))), INT4)  # type: ignore[arg-type]
    assert "1 of 2 comparisons failed." in str(caught.value)
    assert caught.value.remedy == (
        "nothing was written; raise the precision (decoder is at int4); the highest is --precision decoder=fp32, "
        "or report this pair"
    )
