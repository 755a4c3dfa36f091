"""Find published weights, and load them as parameter trees."""
