"""Each test draws the same numbers in each run, whichever tests ran before it (tests/conftest.py)."""

import zlib

import pytest
import torch

of_file = torch.randn(4)


def first_after(seed: int) -> torch.Tensor:
    return torch.randn(4, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def of_fixture() -> torch.Tensor:
    return torch.randn(4)


def test_files_and_fixtures_draw_the_same_numbers_in_each_run(
    request: pytest.FixtureRequest, of_fixture: torch.Tensor
) -> None:
    name = request.node.nodeid
    assert torch.equal(of_file, first_after(zlib.crc32(name.split("::")[0].encode())))
    assert torch.equal(of_fixture, first_after(zlib.crc32(name.encode())))
