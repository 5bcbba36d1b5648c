"""Asking the hub: said at once, answered or ended soon, in one line."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, constants

from anchor_context import hub
from anchor_context.command_line import model_errors
from anchor_context.data.sources import find_inputs


@pytest.fixture(autouse=True)
def online(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 0.2)
    hub._say_once.cache_clear()


@pytest.fixture
def swallows_packets(monkeypatch):
    """A network that neither answers nor refuses, below every timeout of an HTTP library."""
    end = threading.Event()
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: end.wait())
    yield
    end.set()


@pytest.fixture
def refuses(monkeypatch):
    monkeypatch.setattr(
        constants, "ENDPOINT", "http://127.0.0.1:9"
    )  # the discard port: nobody listens


@pytest.mark.usefixtures("swallows_packets")
def test_a_network_that_swallows_packets_ends_in_one_line(capsys):
    says = "--model someone/model is no folder here, and the hub .* does not give it to us: no answer in"
    with pytest.raises(ValueError, match=says), model_errors("someone/model", "--model"):
        raise AssertionError("the library would ask for minutes")
    assert capsys.readouterr().err == "asking the hub for someone/model …\n"

    with pytest.raises(ValueError, match="--dataset someone/data is neither .*no answer in"):
        find_inputs("someone/data")
    with pytest.raises(ValueError, match="no answer"):  # asked again, and not said again
        find_inputs("someone/data")
    assert capsys.readouterr().err == "asking the hub for the data set someone/data …\n"


@pytest.mark.usefixtures("refuses")
def test_no_network_is_one_line():
    with pytest.raises(ValueError, match="Connection refused"):
        hub.find_model_on_hub("someone/model", "--model")


def test_a_proxy_that_does_not_reach_the_hub_is_no_answer(monkeypatch):
    session = SimpleNamespace(head=lambda *_, **__: SimpleNamespace(status_code=502))
    monkeypatch.setattr("huggingface_hub.get_session", lambda: session)
    with pytest.raises(ValueError, match="does not give it to us: HTTP status 502"):
        hub.find_model_on_hub("someone/model", "--model")
    session.head = lambda *_, **__: SimpleNamespace(status_code=404)
    hub.find_model_on_hub("someone/model", "--model")


@pytest.mark.usefixtures("refuses")
def test_a_model_that_was_downloaded_before_is_taken_offline(monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "/cache/config.json")
    with model_errors("someone/model", "--model"):
        assert constants.is_offline_mode()
    assert "--model someone/model is taken as downloaded before" in capsys.readouterr().err


def test_whatever_the_hub_says_no_to_is_one_line(monkeypatch):
    def no(*_, **__):
        raise RuntimeError("not\n  yours")

    monkeypatch.setattr(HfApi, "dataset_info", no)
    with pytest.raises(ValueError, match=r"that the hub gives us \(not yours\)"):
        find_inputs("someone/data")
