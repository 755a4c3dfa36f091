"""Extensions of the documentation."""
