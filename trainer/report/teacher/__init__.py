"""The parts of the page of a comparison with the teacher: tables and charts, the method."""
