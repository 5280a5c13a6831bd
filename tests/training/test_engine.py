from __future__ import annotations

import pytest

from ilvr_ds.errors import UserError
from ilvr_ds.training import engine
from ilvr_ds.training.engine import check_optimizer


def test_a_missing_optimizer_is_told_before_weights_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    check_optimizer("adamw")
    with pytest.raises(UserError, match=r"optim\.name is adamw_8bit: needs bitsandbytes"):
        check_optimizer("adamw_8bit")
