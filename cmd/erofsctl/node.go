package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/urfave/cli/v3"
)

// A node is a machine of a cluster as a pod sees it that installs the services there. The
// pod brings programs and configuration; what runs belongs to the node's systemd, so that no
// end of the pod is one of what containers read from.
type node struct {
	host      *os.Root // the node's root directory
	programs  string   // directory of the pod's programs
	configs   string   // directory of the pod's configuration files
	bin       string   // where programs go on the node
	account   string   // directory of the pod's service account, "": the node gets none
	dropIn    string   // path of a file that the node's containerd imports, "": none
	restart   bool     // restart containerd when that file has changed
	systemctl func(ctx context.Context, args ...string) (string, error)
	probe     func(dir string) error // whether the kernel can do it
	out       io.Writer
}

func nodeCommand() *cli.Command {
	return &cli.Command{
		Name:  "node",
		Usage: "install the services on a machine of a cluster, from a pod (configs/helm)",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "host", Value: "/host", Usage: "`DIR` where the machine's root directory is"},
			&cli.StringFlag{Name: "bin", Value: "/usr/local/bin", Usage: "`DIR` of the machine for the programs"},
			&cli.StringFlag{Name: "configs", Value: "/etc/erofsd", Usage: "`DIR` of the pod with erofsd.toml and containerd-erofsd.toml"},
			&cli.StringFlag{Name: "account", Usage: "`DIR` of the pod's service account, which the snapshotter on the machine gets too (/var/run/secrets/kubernetes.io/serviceaccount)"},
			&cli.StringFlag{Name: "containerd-drop-in", Usage: "`PATH` on the machine of a file that its containerd (2 or later) imports; it is written"},
			&cli.BoolFlag{Name: "restart-containerd", Usage: "restart containerd when that file has changed; containers run on"},
		},
		Commands: []*cli.Command{
			{Name: "install", Usage: "install or upgrade; images stay mounted, containers run on", Action: onNode(node.install)},
			{Name: "keep", Usage: "keep the service account of the machine fresh until it is told to end; nothing on the machine ends with it", Action: onNode(node.keep)},
			{Name: "check", Usage: "say whether the services answer", Action: onNode(node.check)},
			{Name: "remove", Usage: "stop the services and remove them; refused while containerd has anything of the snapshotter", Action: onNode(node.remove)},
		},
	}
}

// onNode calls do with the node that the flags say.
func onNode(do func(node, context.Context) error) cli.ActionFunc {
	return func(ctx context.Context, c *cli.Command) error {
		self, err := os.Executable()
		if err != nil {
			return fmt.Errorf("find this program: %w", err)
		}
		host, err := os.OpenRoot(c.String("host"))
		if err != nil {
			return fmt.Errorf("open the node's root directory: %w (mount it into the pod, or set --host)", err)
		}
		defer host.Close()
		for _, flag := range []string{"bin", "containerd-drop-in"} {
			if p := c.String(flag); p != "" && !filepath.IsAbs(p) {
				return fmt.Errorf("--%s: %q is no absolute path", flag, p)
			}
		}
		return do(node{
			host: host, programs: filepath.Dir(self), configs: c.String("configs"), bin: filepath.Clean(c.String("bin")),
			account: c.String("account"), dropIn: c.String("containerd-drop-in"), restart: c.Bool("restart-containerd"),
			systemctl: systemctlOf(host), probe: ableFanotify, out: c.Root().Writer,
		}, ctx)
	}
}
