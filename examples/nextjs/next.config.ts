import type { NextConfig } from "next";

// The root is this folder: without it, Next.js looks for one in the folders above.
const config: NextConfig = { poweredByHeader: false, turbopack: { root: import.meta.dirname } };

export default config;
