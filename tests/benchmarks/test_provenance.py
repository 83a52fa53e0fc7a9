"""Rows say where their code came from, and say so too where nobody can know."""

import shutil

import pytest

from benchmarks import provenance


@pytest.fixture
def commit_of():
    """Returns what a row would hold as its commit, asked anew."""
    provenance._commit.cache_clear()
    yield lambda: provenance.provenance()["commit"]
    provenance._commit.cache_clear()


def test_without_git(commit_of, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_of() == "unknown, git is not installed"


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_outside_a_checkout(commit_of, monkeypatch, tmp_path):
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "benchmarks" / "provenance.py"))
    (tmp_path / "benchmarks").mkdir()
    assert commit_of() == "not in a git checkout"
