from __future__ import annotations

import pytest
from helpers.hub_server import READER, WRITER
from helpers.measured_run import MODEL, NAME
from helpers.same_runs import assert_equal_weights

from uvit import UViT
from uvit.common.errors import InputError


def test_a_network_is_pushed_and_loaded_again(hub, logged_in):
    model = UViT(MODEL)
    address = model.push_to_hub(NAME)
    files = hub.repositories[NAME]["main"]
    assert files.keys() - {".gitattributes"} == {"README.md", "config.json", "model.safetensors"}
    assert address.startswith(f"{hub.url}/{NAME}/commit/") and not hub.private[NAME]
    loaded = UViT.from_pretrained(NAME)
    assert loaded.config == MODEL and not loaded.training
    assert_equal_weights(model, loaded)
    assert f'UViT.from_pretrained("{NAME}")' in files["README.md"].decode()


def test_revisions_are_kept_apart(hub, logged_in):
    first, second = UViT(MODEL), UViT(MODEL)
    address = first.push_to_hub(NAME, private=True)
    second.push_to_hub(NAME, revision="longer/training")
    assert hub.private[NAME]
    assert_equal_weights(first, UViT.from_pretrained(NAME))
    assert_equal_weights(first, UViT.from_pretrained(NAME, revision=address.rpartition("/")[2]))
    assert_equal_weights(second, UViT.from_pretrained(NAME, revision="longer/training"))
    assert_equal_weights(second, UViT.from_pretrained(f"{NAME}@longer/training"))
    with pytest.raises(InputError, match=r"'me/digits@v2' .* cannot be fetched from the hub: it has no such revision"):
        UViT.from_pretrained(NAME, revision="v2")
    for wrong in ("", "..", "/etc", "a/../b", "a b"):
        with pytest.raises(InputError, match=r"a revision must be a branch|not found"):
            UViT.from_pretrained(NAME, revision=wrong)


def test_fetched_files_load_without_the_hub(hub, logged_in, monkeypatch):
    model = UViT(MODEL)
    model.push_to_hub(NAME)
    UViT.from_pretrained(NAME)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_equal_weights(model, UViT.from_pretrained(NAME))


def test_a_private_model_loads_with_a_token_and_another_cache(hub, tmp_path):
    model = UViT(MODEL)
    model.push_to_hub(NAME, private=True, token=WRITER)
    with pytest.raises(InputError, match="there is no such repository, or it is private"):
        UViT.from_pretrained(NAME)
    own = tmp_path / "own"
    assert_equal_weights(model, UViT.from_pretrained(NAME, token=READER, cache_dir=own))
    assert_equal_weights(model, UViT.from_pretrained(NAME, cache_dir=own, local_files_only=True))
    with pytest.raises(InputError, match="cannot be fetched from the hub: Cannot find an appropriate cached snapshot"):
        UViT.from_pretrained(NAME, token=READER, local_files_only=True)


def test_a_revision_of_a_folder_is_refused(measured_run):
    with pytest.raises(InputError, match="revision must be None for what is on disk, got 'v1' for "):
        UViT.from_pretrained(measured_run, revision="v1")
