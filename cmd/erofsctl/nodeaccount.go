package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"
)

// accountPause is how often the pod's token is looked at; the kubelet renews it long before
// it ends.
const accountPause = time.Minute

// keep copies the pod's token to the node whenever the kubelet has renewed it, until ctx
// ends.
func (n node) keep(ctx context.Context) error {
	tick := time.NewTicker(accountPause)
	defer tick.Stop()
	for {
		if n.account != "" {
			if err := n.copyAccount(); err != nil {
				fmt.Fprintln(n.out, "warning:", err)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// copyAccount gives the snapshotter on the node the pod's service account.
func (n node) copyAccount() error {
	host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return errors.New("--account: this is no pod of a cluster (no KUBERNETES_SERVICE_HOST)")
	}
	for _, name := range []string{"ca.crt", "token"} {
		data, err := read(filepath.Join(n.account, name))
		if err == nil {
			_, err = n.place(filepath.Join(nodeAccount, name), data, 0o600)
		}
		if err != nil {
			return fmt.Errorf("copy the service account: %w", err)
		}
	}
	_, err := n.place(filepath.Join(nodeAccount, "kubeconfig"), []byte(kubeconfigText(host, port)), 0o600)
	return err
}

// kubeconfigText names the cluster and where the account is on the node.
func kubeconfigText(host, port string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: node
contexts: [{name: node, context: {cluster: node, user: node}}]
clusters: [{name: node, cluster: {server: "https://%[1]s", certificate-authority: %[2]s/ca.crt}}]
users: [{name: node, user: {tokenFile: %[2]s/token}}]
`, net.JoinHostPort(host, port), nodeAccount)
}
