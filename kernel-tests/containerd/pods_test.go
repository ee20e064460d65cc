package containerd

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/erofsd/erofsd/kernel-tests/services"
)

// A kubelet speaks to containerd's CRI: for images by way of the snapshotter's socket, as with
// --image-service-endpoint.
type kubelet struct {
	cri.RuntimeServiceClient
	cri.ImageServiceClient
	n       *node
	handler string // the pods' runtime
}

// newKubelet is one for a node, for as long as t.
func (n *node) newKubelet(t *testing.T, handler string) *kubelet {
	t.Helper()
	dial := func(socket string) *grpc.ClientConn {
		conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	k := &kubelet{
		cri.NewRuntimeServiceClient(dial(n.socket())),
		cri.NewImageServiceClient(dial(filepath.Join(n.dir, "s.sock"))), n, handler,
	}
	n.await(t, "the CRI is ready", func() error {
		_, err := k.Status(t.Context(), &cri.StatusRequest{})
		return err
	})
	return k
}

// ofPods are the cases of pods. They share a node and leave nothing on it.
var ofPods = []struct {
	name string
	two  bool // containerd 2 alone has it
	run  func(*kubelet, *testing.T)
}{
	{"life", false, (*kubelet).life},
	{"login", false, (*kubelet).login},
	{"volume", false, (*kubelet).volume},
	{"image-volume", true, (*kubelet).imageVolume},
}

// pods does as Kubernetes does.
func (w *world) pods(t *testing.T, o nodeOptions) {
	cases := ofPods
	if o.handler != "" || o.transfer {
		cases = cases[:2] // another way to pull, with and without a login
	}
	o.pods = true
	n := w.startNode(t, o)
	for _, c := range cases {
		if c.two && !w.runtime.Two() {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			k := n.newKubelet(t, o.handler)
			t.Cleanup(func() { n.clean(t) })
			t.Cleanup(func() { k.clear(t) })
			c.run(k, t)
		})
	}
}

// life pulls an image, runs a pod, reads, looks at what it takes, and removes everything.
func (k *kubelet) life(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), bound)
	defer cancel()
	image := k.pull(ctx, t, k.n.w.lazy, nil)
	pulled, err := k.n.GetImage(namespaces.WithNamespace(ctx, "k8s.io"), k.n.w.lazy)
	if err != nil {
		t.Fatal(err)
	}
	if k.n.dataPulled(namespaces.WithNamespace(ctx, "k8s.io"), t, pulled) {
		t.Error("a layer with data was pulled")
	}
	p := k.run(ctx, t, image)
	p.read(ctx, t)
	if k.handler == "" { // containerd 2.4 counts nothing of snapshotters other than the default
		p.counted(ctx, t)
	}
	p.read(ctx, t)
	p.remove(ctx, t)
	k.remove(ctx, t, k.n.w.lazy, k.n.w.pause)
	k.n.empty(ctx, t)
}

// login runs an image that only who logs in may read: kubelet has the login, and the daemon
// gets it.
func (k *kubelet) login(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), bound)
	defer cancel()
	reference := k.n.w.private + "/app:lazy"
	spec := &cri.ImageSpec{Image: reference}
	if _, err := k.PullImage(ctx, &cri.PullImageRequest{Image: spec, Auth: &cri.AuthConfig{Username: services.User, Password: "another"}}); err == nil {
		t.Error("the image was pulled with a wrong password")
	}
	p := k.run(ctx, t, k.pull(ctx, t, reference, &cri.AuthConfig{Username: services.User, Password: services.Password}))
	p.read(ctx, t)
	p.remove(ctx, t)
	k.remove(ctx, t, reference, k.n.w.pause)
	if strings.Contains(k.n.snapshotter.Log(), services.Password) {
		t.Error("the password is in the log")
	}
}

// volume runs an image that says that /data is a volume: containerd copies what the image has
// there.
func (k *kubelet) volume(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), bound)
	defer cancel()
	p := k.run(ctx, t, k.pull(ctx, t, k.n.w.volume, nil))
	if got := p.exec(ctx, t, "show", "/proc/self/mountinfo"); !strings.Contains(got, " /data ") {
		t.Errorf("/data is no volume:\n%s", got)
	}
	p.read(ctx, t)
	p.remove(ctx, t)
	k.remove(ctx, t, k.n.w.volume, k.n.w.pause)
}

// imageVolume mounts a lazy image in a container of another one.
func (k *kubelet) imageVolume(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), bound)
	defer cancel()
	image := k.pull(ctx, t, k.n.w.lazy, nil)
	p := k.run(ctx, t, k.pull(ctx, t, k.n.w.pause, nil), &cri.Mount{ContainerPath: "/image", Image: &cri.ImageSpec{Image: image}, Readonly: true})
	if got := p.exec(ctx, t, "read", "/image/data"); got != k.n.w.want {
		t.Errorf("the volume reads %q, want %q", got, k.n.w.want)
	}
	p.remove(ctx, t)
	k.remove(ctx, t, k.n.w.lazy, k.n.w.pause)
}

// pull pulls an image and returns what containers call it by.
func (k *kubelet) pull(ctx context.Context, t *testing.T, reference string, login *cri.AuthConfig) string {
	t.Helper()
	r, err := k.PullImage(ctx, &cri.PullImageRequest{
		Image: &cri.ImageSpec{Image: reference, RuntimeHandler: k.handler}, Auth: login,
		SandboxConfig: &cri.PodSandboxConfig{}, // without one containerd does not look at the handler
	})
	if err != nil {
		t.Fatal(err)
	}
	return r.ImageRef
}

// remove removes images.
func (k *kubelet) remove(ctx context.Context, t *testing.T, references ...string) {
	t.Helper()
	for _, r := range references {
		if _, err := k.RemoveImage(ctx, &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: r}}); err != nil {
			t.Error(err)
		}
	}
}

// clear removes the pods that are left when a test failed.
func (k *kubelet) clear(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), bound)
	defer cancel()
	left, err := k.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	if err != nil {
		t.Error(err)
	}
	for _, s := range left.GetItems() {
		_, err := k.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: s.Id})
		if err == nil {
			_, err = k.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: s.Id})
		}
		t.Errorf("pod %s was left: removed, %v", s.Id, err)
	}
}

// A pod has one container, which waits.
type pod struct {
	k                  *kubelet
	sandbox, container string
}

// run starts a pod in the host's network.
func (k *kubelet) run(ctx context.Context, t *testing.T, image string, mounts ...*cri.Mount) *pod {
	t.Helper()
	logs, err := os.MkdirTemp(k.n.dir, "logs-*")
	if err != nil {
		t.Fatal(err)
	}
	config := &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: "pod", Namespace: "default", Uid: filepath.Base(logs)},
		LogDirectory: logs,
		Linux: &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{
			NamespaceOptions: &cri.NamespaceOption{Network: cri.NamespaceMode_NODE},
		}},
	}
	p := &pod{k: k}
	s, err := k.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: config, RuntimeHandler: k.handler})
	if err != nil {
		t.Fatal(err)
	}
	p.sandbox = s.PodSandboxId
	c, err := k.CreateContainer(ctx, &cri.CreateContainerRequest{
		PodSandboxId: p.sandbox, SandboxConfig: config,
		Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "app"}, Image: &cri.ImageSpec{Image: image, RuntimeHandler: k.handler},
			Command: []string{"/bin/check", "pause"}, LogPath: "log", Mounts: mounts,
			Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{
				NamespaceOptions: &cri.NamespaceOption{Network: cri.NamespaceMode_NODE},
			}},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	p.container = c.ContainerId
	if _, err := k.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: p.container}); err != nil {
		t.Fatal(err)
	}
	return p
}

// exec executes check in the container.
func (p *pod) exec(ctx context.Context, t *testing.T, args ...string) string {
	t.Helper()
	r, err := p.k.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: p.container, Cmd: append([]string{"/bin/check"}, args...)})
	if err != nil || r.ExitCode != 0 {
		t.Errorf("execute %q: %v, %v", args, r, err)
	}
	return string(r.GetStdout())
}

// read has the container read everything.
func (p *pod) read(ctx context.Context, t *testing.T) {
	t.Helper()
	if got := p.exec(ctx, t); got != p.k.n.w.want {
		t.Errorf("the container reads %q, want %q", got, p.k.n.w.want)
	}
}

// counted writes, and waits until the CRI tells what container and images take.
func (p *pod) counted(ctx context.Context, t *testing.T) {
	t.Helper()
	n := p.k.n
	p.exec(ctx, t, "write", "/more", strings.Repeat("x", 100_000))
	n.await(t, "the container's writable layer is counted", func() error {
		s, err := p.k.ContainerStats(ctx, &cri.ContainerStatsRequest{ContainerId: p.container})
		if used := s.GetStats().GetWritableLayer().GetUsedBytes().GetValue(); err == nil && (used < 100_000 || used > 1_000_000) {
			err = fmt.Errorf("it takes %d bytes", used)
		}
		return err
	})
	n.containerd.Kill() // while it runs it asks for what images take only once, because those of others do not grow
	n.containerd.Start(t)
	n.await(t, "the image is counted", func() error {
		s, err := p.k.ImageFsInfo(ctx, &cri.ImageFsInfoRequest{})
		if err != nil {
			return err
		}
		for _, f := range s.ImageFilesystems {
			if f.GetUsedBytes().GetValue() > 8_000_000 && (!n.w.runtime.Two() || f.GetFsId().GetMountpoint() == filepath.Join(n.dir, "snapshots")) {
				return nil
			}
		}
		return fmt.Errorf("%v", s)
	})
}

// remove removes the pod.
func (p *pod) remove(ctx context.Context, t *testing.T) {
	t.Helper()
	_, err := p.k.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: p.container, Timeout: 10})
	if err == nil {
		_, err = p.k.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: p.container})
	}
	if err == nil {
		_, err = p.k.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.sandbox})
	}
	if err == nil {
		_, err = p.k.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: p.sandbox})
	}
	if err != nil {
		t.Error(err)
	}
}
