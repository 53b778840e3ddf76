// The settings dialog. Its fields carry the names of the server's interface; an empty one is not sent.

import { loadSettings, saveSettings } from "./store.js";

const dialog = document.querySelector("#settings-dialog");
const form = dialog.querySelector("form");
const fields = [...form.querySelectorAll("input, textarea")];

export function openSettings() {
  const settings = loadSettings();
  for (const field of fields) field.value = settings[field.name] ?? "";
  dialog.showModal();
}

form.addEventListener("input", () => {
  const entries = fields
    .filter((field) => field.value.trim() !== "" && field.validity.valid)
    .map((field) => [field.name, field.type === "number" ? field.valueAsNumber : field.value]);
  saveSettings(Object.fromEntries(entries));
});
// A click beside the dialog closes it.
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close();
});
document.querySelector("#settings-reset").addEventListener("click", () => {
  for (const field of fields) field.value = "";
  saveSettings({});
});
