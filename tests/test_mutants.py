from tests import mutants


def test_every_mutant_applies() -> None:
    assert not mutants.misplaced(mutants.MUTANTS, mutants.ROOT)
