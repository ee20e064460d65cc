// Package keychain finds the logins with which images are read from registries: a [Chain]
// asks its providers in their order, and the first that has one counts.
//
//	Docker   docker's configuration and credential helpers
//	CRI      what the kubelet sent with PullImage, past a proxy of the image service
//	Kubelet  the kubelet's credential provider plugins
//	Secrets  Kubernetes secrets of type kubernetes.io/dockerconfigjson
//
// Logins are in memory only. Nothing here writes them anywhere, no error or log record has
// them, and [Login] does not print. What is kept is bounded, in number and size, and every
// provider answers within a minute.
package keychain
