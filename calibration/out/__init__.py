"""The artefact folder OUT: stages, manifest, fingerprints, checks."""
