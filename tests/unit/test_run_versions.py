"""Libraries that the project does not work with are named in one line, before anything else."""

from __future__ import annotations

from importlib import metadata

import pytest

import train
from anchor_context import launch
from anchor_context.run.versions import check_versions, working_ranges


@pytest.fixture
def installed(monkeypatch):
    """installed(name=version, …) pretends so; None is not installed."""
    real = metadata.version

    def pretend(**versions: str | None) -> None:
        def version(name: str) -> str:
            if name in versions and versions[name] is None:
                raise metadata.PackageNotFoundError(name)
            return versions.get(name) or real(name)

        monkeypatch.setattr(metadata, "version", version)

    return pretend


def test_the_four_have_a_range_and_what_was_tested_lies_in_it():
    ranges = working_ranges()
    assert {tested.name for tested in ranges} == {
        "torch",
        "transformers",
        "accelerate",
        "deepspeed",
    }
    for tested, works in ranges.items():
        (exact,) = tested.specifier
        assert exact.operator == "==" and works.contains(exact.version), tested
        assert {bound.operator for bound in works} == {">=", "<"}, tested


def test_what_is_here_works():
    check_versions()


@pytest.mark.parametrize(
    ("name", "version", "works"),
    [
        ("transformers", "5.22.2", False),  # no activation_checkpointing_enable
        ("transformers", "5.23.0", True),
        ("transformers", "6.0.0", False),
        ("deepspeed", "0.19.1", False),
        ("deepspeed", "0.19.2", True),
        ("accelerate", "1.11.0", False),
        ("accelerate", "1.12.0", True),
        ("torch", "2.10.0+cu128", False),
        ("torch", "2.11.0+cu130", True),
        ("torch", "2.15.0.dev20261101+cu130", True),
        ("torch", None, False),
    ],
)
def test_a_version_outside_its_range_is_named_with_the_remedy(name, version, works, installed):
    installed(**{name: version})
    if works:
        check_versions()
        return
    with pytest.raises(ValueError) as error:
        check_versions()
    message = str(error.value)
    assert message.startswith(f"{name} {version or 'is not installed'} (works: ")
    assert "\n" not in message and message.endswith(f"pip install {pinned(name)}")


def pinned(name: str) -> str:
    return next(str(requirement) for requirement in working_ranges() if requirement.name == name)


def test_two_at_once_are_one_line(installed):
    installed(transformers="4.57.6", deepspeed="0.18.9")
    with pytest.raises(
        ValueError, match=r"transformers 4.57.6 .*, deepspeed 0.18.9 .*: pip install"
    ):
        check_versions()


def test_a_run_looks_first(installed):
    installed(transformers="4.57.6")
    with pytest.raises(ValueError, match="transformers 4.57.6"):
        train.main(None)  # nothing was asked of the flags yet


def test_the_launcher_looks_before_it_starts_ranks(installed, capsys):
    installed(transformers="4.57.6")
    assert launch.main(["--no-such-flag"]) == 2
    printed = capsys.readouterr().err
    assert "error: transformers 4.57.6" in printed and printed.count("\n") == 1
