"""What several test files share: models, problems of the operators and of row choice, text, and other processes."""
