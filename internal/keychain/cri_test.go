package keychain

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// imageServer is containerd's image service, more or less.
type imageServer struct {
	cri.UnimplementedImageServiceServer
	mu    sync.Mutex
	pulls []*cri.PullImageRequest
}

func (s *imageServer) PullImage(ctx context.Context, r *cri.PullImageRequest) (*cri.PullImageResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pulls = append(s.pulls, r)
	if r.Auth.GetPassword() == "wrong" {
		return nil, status.Error(codes.Unauthenticated, "no")
	}
	md, _ := metadata.FromIncomingContext(ctx)
	err := errors.Join(grpc.SetHeader(ctx, metadata.Pairs("got", strings.Join(md.Get("sent"), ","))), grpc.SetTrailer(ctx, metadata.Pairs("after", "all")))
	return &cri.PullImageResponse{ImageRef: "ref of " + r.Image.GetImage()}, err
}

func (s *imageServer) ListImages(context.Context, *cri.ListImagesRequest) (*cri.ListImagesResponse, error) {
	r := &cri.ListImagesResponse{}
	for i := range 60000 { // more than gRPC's own limit of 4 MiB
		r.Images = append(r.Images, &cri.Image{Id: fmt.Sprintf("sha256:%064d", i), RepoTags: []string{fmt.Sprintf("r.example/app:%d", i)}})
	}
	return r, nil
}

func serveGRPC(t *testing.T, s *grpc.Server) (address string) {
	t.Helper()
	address = filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", address)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { defer close(done); s.Serve(l) }()
	t.Cleanup(func() { s.Stop(); <-done })
	return address
}

// newProxy returns a proxy before a server, and a client of the proxy.
func newProxy(t *testing.T, changed chan struct{}) (*imageServer, *CRI, *grpc.ClientConn) {
	t.Helper()
	service := &imageServer{}
	behind := grpc.NewServer()
	cri.RegisterImageServiceServer(behind, service)
	cri.RegisterRuntimeServiceServer(behind, cri.UnimplementedRuntimeServiceServer{})
	c, err := NewCRI(serveGRPC(t, behind), changed)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient("unix://"+serveGRPC(t, grpc.NewServer(c.ServerOptions()...)),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxCRIMessage)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(conn.Close(), c.Close()); err != nil {
			t.Error(err)
		}
	})
	return service, c, conn
}

// TestProxy forwards calls as they are, and nothing but those of the image service.
func TestProxy(t *testing.T) {
	service, _, conn := newProxy(t, nil)
	client := cri.NewImageServiceClient(conn)
	var header, trailer metadata.MD
	ctx := metadata.AppendToOutgoingContext(t.Context(), "sent", "this")
	request := &cri.PullImageRequest{
		Image: &cri.ImageSpec{Image: "app", Annotations: map[string]string{"a": "b"}}, Auth: &cri.AuthConfig{Username: "anna", Password: secretText},
		SandboxConfig: &cri.PodSandboxConfig{Metadata: &cri.PodSandboxMetadata{Name: "pod"}},
	}
	r, err := client.PullImage(ctx, request, grpc.Header(&header), grpc.Trailer(&trailer))
	if err != nil || r.ImageRef != "ref of app" {
		t.Fatalf("%v, %v", r, err)
	}
	if strings.Join(header.Get("got"), "") != "this" || strings.Join(trailer.Get("after"), "") != "all" {
		t.Errorf("header %v, trailer %v", header, trailer)
	}
	if got := service.pulls[0]; got.String() != request.String() {
		t.Errorf("the service got %v, want %v", got, request)
	}
	list, err := client.ListImages(t.Context(), &cri.ListImagesRequest{})
	if err != nil || len(list.Images) != 60000 {
		t.Errorf("%d images, %v", len(list.GetImages()), err)
	}
	if _, err := client.RemoveImage(t.Context(), &cri.RemoveImageRequest{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("a call that the service does not know: %v", err)
	}
	_, err = cri.NewRuntimeServiceClient(conn).Version(t.Context(), &cri.VersionRequest{})
	if status.Code(err) != codes.Unimplemented || !strings.Contains(err.Error(), "is not served here") {
		t.Errorf("a call of the runtime service: %v", err)
	}
}

// TestRemembered pulls with logins of all kinds and asks for them.
func TestRemembered(t *testing.T) {
	changed := make(chan struct{}, 1)
	_, c, conn := newProxy(t, changed)
	client := cri.NewImageServiceClient(conn)
	pull := func(image string, auth *cri.AuthConfig) {
		t.Helper()
		_, err := client.PullImage(t.Context(), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: image}, Auth: auth})
		if (err == nil) != (auth.GetPassword() != "wrong") {
			t.Fatalf("pull %s: %v", image, err)
		}
	}
	auth := base64.StdEncoding.EncodeToString([]byte("carl:3"))
	for image, a := range map[string]*cri.AuthConfig{
		"r.example/app:1":    {Username: "anna", Password: "1"},
		"debian":             {Username: "hub", Password: "2", ServerAddress: "https://index.docker.io/v1/"},
		"r.example/auth":     {Auth: auth},
		"r.example/token":    {RegistryToken: "t"},
		"r.example/identity": {IdentityToken: "i"},
		"r.example/other":    {Username: "mallory", Password: "m", ServerAddress: "other.example"},
		"r.example/none":     nil,
		"r.example/failed":   {Username: "x", Password: "wrong"},
	} {
		pull(image, a)
	}
	for image, want := range map[string]string{
		"r.example/app:1": "anna:1", "r.example/app:2": "anna:1", "r.example/app@sha256:" + strings.Repeat("0", 64): "anna:1",
		"docker.io/library/debian:latest": "hub:2", "r.example/auth:latest": "carl:3", "r.example/token": ":t",
		"r.example/identity": "", "r.example/other": "", "r.example/none": "", "r.example/failed": "", "s.example/app:1": "",
	} {
		l, err := c.Login(t.Context(), image)
		got := ""
		if err == nil {
			got = l.Username + ":" + l.Password
		} else if !errors.Is(err, ErrForgotten) {
			t.Error(err)
		}
		if got != want {
			t.Errorf("%s: %q, want %q", image, got, want)
		}
	}
	<-changed
	pull("r.example/app:1", &cri.AuthConfig{Username: "anna", Password: "1"})
	pull("r.example/app:1", &cri.AuthConfig{Username: "x", Password: "wrong"})
	pull("r.example/app:1", nil)
	select {
	case <-changed:
		t.Error("a signal though nothing is new")
	default:
	}
	pull("r.example/app:1", &cri.AuthConfig{Username: "anna", Password: "new"})
	<-changed
	if l, err := c.Login(t.Context(), "r.example/app:1"); err != nil || l.Password != "new" {
		t.Errorf("the old login counts: %v", err)
	}
}

// TestRememberedBounded: the oldest are forgotten.
func TestRememberedBounded(t *testing.T) {
	c := &CRI{}
	for i := range 2 * maxRemembered {
		c.remember(pulled{fmt.Sprintf("r.example/app%d:1", i), Login{Password: "x"}})
		c.remember(pulled{"r.example/used:1", Login{Password: "y"}})
	}
	if len(c.pulled) != maxRemembered {
		t.Errorf("%d logins are kept", len(c.pulled))
	}
	for image, want := range map[string]bool{"used:1": true, fmt.Sprintf("app%d:1", 2*maxRemembered-1): true, "app0:1": false} {
		if _, err := c.Login(t.Context(), "r.example/"+image); (err == nil) != want {
			t.Errorf("%s: %v", image, err)
		}
	}
}

func FuzzParsePull(f *testing.F) {
	f.Add([]byte{10, 3, 10, 1, 'a', 18, 3, 10, 1, 'b'})
	f.Add([]byte{10, 255, 255, 255, 255, 255, 1})
	f.Fuzz(func(_ *testing.T, p []byte) { loginOf(p) })
}
