// Package torture has tests that kill, stop, starve and lie to a running erofsd while
// readers compare every byte that they get. The short form of each is a part of make
// test; make torture and make soak run the long ones, with SEED= and MINUTES=.
//
// The daemon is this test program, started again as keeper and as worker. Built with the
// tag failpoint it can be told to die at a named place; kernel-tests/testrun does that.
package torture
