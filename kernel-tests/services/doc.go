// Package services starts the servers that erofsd reads from, as other people wrote
// them: Debian's docker-registry and squid, and versitygw, each as a process on loopback
// that a test can stop, kill and start again at the same port; and containerd, Debian's and
// version 2. What none of them does comes from this process: a token service, a certificate
// authority, a forward proxy that fails on demand, and a bucket with OSS's signatures.
//
// It is for tests. As root on Debian, missing packages are installed, and versitygw and
// containerd 2 are built once; elsewhere the test is skipped by a gate of internal/testenv
// named docker-registry, squid, versitygw or containerd. Everything ends with the test that
// started it. A process is for one goroutine at a time, servers in this process are safe for
// concurrent use.
package services
