// The card at the end of a conversation when something went wrong: what, and a button that helps.

import { rememberKey } from "./api.js";
import { el } from "./dom.js";

const place = document.querySelector("#notice");
let countdown = 0;

export function clearNotice() {
  clearInterval(countdown);
  place.replaceChildren();
}

/** Shows `error`. `actions` has retry and startNew. */
export function showNotice(error, { retry, startNew }) {
  clearNotice();
  const button = (label, onclick, style = "quiet") => el("button", { type: "button", class: style, onclick }, label);
  const again = (label = "Try again") => button(label, retry, "primary");
  const card = (...children) => place.replaceChildren(el("div", { class: "notice", role: "alert" },
    el("p", {}, error.message), el("div", { class: "buttons" }, ...children)));
  switch (error.kind) {
    case "key":
      card(keyForm(retry));
      place.querySelector("input").focus();
      break;
    case "busy": {
      const now = again();
      card(now, button("Cancel", clearNotice));
      let seconds = Math.ceil(error.retryAfter);
      const tick = () => {
        now.textContent = `Trying again in ${seconds} s`;
        if (seconds-- <= 0) retry();
      };
      tick();
      countdown = setInterval(tick, 1000);
      break;
    }
    case "new":
      card(button("New conversation", startNew, "primary"));
      break;
    default:
      card(again());
  }
}

/** Says something that needs no action. */
export function showMessage(message) {
  clearNotice();
  place.replaceChildren(el("div", { class: "notice", role: "status" },
    el("p", {}, message), el("div", { class: "buttons" },
      el("button", { type: "button", class: "quiet", onclick: clearNotice }, "Close"))));
}

function keyForm(retry) {
  const input = el("input", { type: "password", "aria-label": "API key", placeholder: "API key", autocomplete: "off" });
  const onsubmit = (event) => {
    event.preventDefault();
    rememberKey(input.value.trim());
    retry();
  };
  return el("form", { class: "key", onsubmit }, input, el("button", { class: "primary" }, "Continue"));
}
