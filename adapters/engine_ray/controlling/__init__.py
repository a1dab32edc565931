"""What goes with a controller: workers as actors, where they run, how they end, and engines that are detached."""
