"""The ground floor: errors, registry, configuration, files, weight files, seeds and component cases."""
