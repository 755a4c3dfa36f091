from tests import mutants


def test_every_mutant_applies() -> None:
    """The expression of each mutant is in its room exactly once, and its test exists."""
    assert not mutants.misplaced(mutants.MUTANTS, mutants.ROOT)
