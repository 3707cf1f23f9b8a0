"""From scores to probabilities that hold: calibrators, fitted on validation users only."""

CALIBRATORS = {
    "identity": "genrec.calibration.scores:IdentityCalibrator",
    "temperature": "genrec.calibration.scores:TemperatureCalibrator",
}
