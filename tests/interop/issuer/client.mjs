// Better Auth's own browser client, for a test page: import { createAuthClient, jwtClient } from
// "/client.js", then createAuthClient({ plugins: [jwtClient()] }).token().
export { createAuthClient } from "better-auth/client";
export { jwtClient } from "better-auth/client/plugins";
