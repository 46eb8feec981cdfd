import { headers } from "next/headers";
import { SignIn } from "@/components/sign-in";
import { Tasks } from "@/components/tasks";
import { auth } from "@/lib/auth";

export default async function Page() {
  const session = await auth.api.getSession({ headers: await headers() });
  if (!session) return <SignIn />;
  const { id, name, email } = session.user;
  return <Tasks key={id} user={{ id, name, email }} apiUrl={process.env.API_URL ?? ""} />;
}
