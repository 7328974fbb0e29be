"""Read, decode and encode samples as training needs them: for data larger than the disk. Nothing is cached."""
