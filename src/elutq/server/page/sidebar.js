// The list of conversations, and on a narrow window the drawer it is in.

import { el, iconButton, isSubmit } from "./dom.js";

const list = document.querySelector("#conversations");
const sidebar = document.querySelector("#sidebar");
const scrim = document.querySelector("#scrim");
const menuButton = document.querySelector("#menu-button");
const narrow = matchMedia("(max-width: 800px)");

/** Shows the conversations. `actions` has open, rename(conversation, title) and remove. */
export function drawConversations(conversations, current, actions) {
  list.replaceChildren(...conversations.map((conversation) => {
    const title = conversation.title || "New conversation";
    const item = el("li", { class: conversation.id === current.id ? "current" : null },
      el("button", {
        type: "button",
        class: "title",
        title,
        "aria-current": conversation.id === current.id ? "true" : null,
        onclick: () => actions.open(conversation),
      }, title),
      iconButton("edit", `Rename ${title}`, () => rename(item, conversation, actions)),
      iconButton("delete", `Delete ${title}`, () => actions.remove(conversation)));
    return item;
  }));
}

function rename(item, conversation, actions) {
  const input = el("input", { "aria-label": "Title", maxlength: 200 });
  input.value = conversation.title;
  let open = true;
  const finish = (keep) => {
    if (!open) return;
    open = false;
    actions.rename(conversation, (keep && input.value.trim()) || conversation.title);
  };
  input.addEventListener("blur", () => finish(true));
  input.addEventListener("keydown", (event) => {
    if (isSubmit(event)) finish(true);
    if (event.key === "Escape") {
      event.stopPropagation();
      finish(false);
    }
  });
  item.replaceChildren(input);
  input.select();
}

/** Opens or closes the drawer. A wide window shows the list always. */
export function showDrawer(open) {
  sidebar.classList.toggle("open", open);
  sidebar.inert = narrow.matches && !open;
  scrim.hidden = !open;
  menuButton.setAttribute("aria-expanded", open);
  if (open) list.querySelector("button")?.focus();
}

menuButton.addEventListener("click", () => showDrawer(true));
scrim.addEventListener("click", () => showDrawer(false));
narrow.addEventListener("change", () => showDrawer(false));
sidebar.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !scrim.hidden) {
    event.stopPropagation();
    showDrawer(false);
    menuButton.focus();
  }
});
showDrawer(false);
