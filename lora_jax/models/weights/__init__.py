"""Published weights: where they are found, and how they become parameter trees."""
