"""The phase `collect`: logged data of many tasks, and where they come from."""
