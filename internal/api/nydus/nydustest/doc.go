// Package nydustest is the conformance suite of nydusd's API: golden requests and
// answers in testdata, from what nydusd answers and what its clients rely on.
//
// [Run] runs them against anything at a unix socket: the handler over a model, the
// daemon over each transport. A file is one sequence over one fresh daemon, in
// datadriven's form:
//
//	start state=RUNNING          the daemon that the sequence wants, see Setup
//	http                         one request: method and target, then the body.
//	PUT /api/v1/daemon           With parallel=N it is sent N times at once, with
//	{"log_level":"debug"}        only=model or only=daemon not to the other one
//	----
//	204                          status, then the body on one line
//	raw                          bytes, with lines ended as HTTP does; with body
//	                             the last line is not ended; closes: the daemon ends
//	                             the connection after its answers=N (default 1)
//	gone                         waits until nobody listens any more
//
// In what is expected * stands for any text and ${NAME} for a variable. Whatever a
// sequence says, every answer must have the API's header and no secret, and no
// connection that is idle is closed.
package nydustest
