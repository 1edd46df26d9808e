from __future__ import annotations

import pytest

from headrace.errors import StartupError
from services.router.objectives import Objective, Objectives


def test_models_have_the_general_objective_or_their_own() -> None:
    objectives = Objectives.parse(["500", "org/model=2000"], ["a=b=30"])
    assert objectives.of("any") == Objective(500, 0)
    assert objectives.of("org/model") == Objective(2000, 0)
    assert objectives.of("a=b") == Objective(500, 30)
    assert Objectives.parse([], []).of("any") == Objective(0, 0)


@pytest.mark.parametrize("said", ["fast", "0", "-1", "nan", "inf", "m=", "m=x", ""])
def test_bad_ones_name_the_setting(said: str) -> None:
    with pytest.raises(StartupError, match=r"--slo-itl-ms must be MS or MODEL=MS"):
        Objectives.parse([], [said])


def test_twice_is_once_too_often() -> None:
    with pytest.raises(StartupError, match=r"--slo-ttft-ms is given twice for model 'm'"):
        Objectives.parse(["m=1", "m=2"], [])
