"""The worker's side: the actor, its channels, what it is told and says, what it prints."""
