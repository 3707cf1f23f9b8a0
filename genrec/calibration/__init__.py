"""From scores to probabilities that hold: calibrators, fitted on validation users only."""

CALIBRATORS = {
    "identity": "genrec.calibration.scores:IdentityCalibrator",
    "temperature": "genrec.calibration.scores:TemperatureCalibrator",
    "level_temperature": "genrec.calibration.levels:LevelTemperatureCalibrator",
    "platt": "genrec.calibration.maps:PlattCalibrator",
    "isotonic": "genrec.calibration.maps:IsotonicCalibrator",
    "beta": "genrec.calibration.maps:BetaCalibrator",
}
