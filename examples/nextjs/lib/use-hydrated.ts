import { useSyncExternalStore } from "react";

const subscribe = () => () => {};

/** Returns whether the page's scripts run. Before, the browser itself would submit a form. */
export function useHydrated(): boolean {
  return useSyncExternalStore(subscribe, () => true, () => false);
}
