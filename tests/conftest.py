"""Settings of every test."""

from __future__ import annotations

import hypothesis

# Busy machines make single examples slow; a deadline would only make tests flaky.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.load_profile("default")
