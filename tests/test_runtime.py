"""Where does code run? The named device, that of the block, or the best at hand."""

from __future__ import annotations

import pytest

from genrec.errors import UserError
from genrec.runtime import choose_device, default_device


def test_a_block_decides_for_parts_without_a_setting_and_ends_with_an_error() -> None:
    import torch

    before = choose_device()
    with pytest.raises(ZeroDivisionError), default_device(torch.device("meta")):
        assert choose_device().type == "meta"
        assert choose_device("cpu").type == "cpu"  # a name wins
        with default_device(torch.device("cpu")):
            assert choose_device().type == "cpu"
        assert choose_device().type == "meta"
        raise ZeroDivisionError
    assert choose_device() == before


def test_a_device_that_is_not_here_says_what_to_use() -> None:
    with pytest.raises(UserError, match=r"device: got 'cuda:99'.*Use 'cpu'"):
        choose_device("cuda:99")


def test_a_run_lends_its_device_to_encoders_and_tokenizers(
    small_config, small_cache, small_run, tmp_path, monkeypatch
) -> None:
    """On another device than the default, every part without a setting must be asked there."""
    import torch

    from genrec.pipeline.config import load_run_config
    from genrec.pipeline.run import Run

    asked = []
    run = Run(load_run_config(small_config), out=tmp_path / "r", cache=small_cache, device="cpu")
    tokens = run.tokens
    monkeypatch.setattr(run, "tokens", lambda *a: asked.append(choose_device()) or tokens(*a))
    with default_device(torch.device("meta")):
        run.execute()
        assert choose_device().type == "meta"
    assert asked == [torch.device("cpu")]
