"""The parts of the page of a comparison with the teacher: findings in words, tables and charts, the method."""
