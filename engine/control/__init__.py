"""The controller: what the application wants, and what is done to get there."""
