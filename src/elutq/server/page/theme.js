// Runs before the first paint, so that a chosen theme does not flash. No choice follows the system.
const theme = localStorage.getItem("elutq.theme");
if (theme) document.documentElement.dataset.theme = theme;
