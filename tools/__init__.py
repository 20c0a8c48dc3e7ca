"""What writes the example workflows, and what checks a release."""
