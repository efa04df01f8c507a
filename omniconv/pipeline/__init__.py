"""The main job: check, plan, fit, report, run folders."""
