"""Facts about fewstep; shared helpers are imported as tests.NAME."""
