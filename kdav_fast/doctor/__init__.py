"""What this machine offers a run, and what is in its way."""

from kdav_fast.doctor.findings import Finding, diagnosis_json, print_diagnosis
from kdav_fast.doctor.loss_choice import loss_finding, parse_loss_shape
from kdav_fast.doctor.machine import diagnose

__all__ = ["Finding", "diagnose", "diagnosis_json", "loss_finding", "parse_loss_shape", "print_diagnosis"]
