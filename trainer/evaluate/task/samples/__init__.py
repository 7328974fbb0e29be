"""The samples of a comparison on a task: their pictures and conditions, the sets, what runs answer, its file."""
