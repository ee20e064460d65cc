package keychain

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"
	"sync"

	"github.com/distribution/reference"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

const (
	maxRemembered = 1024     // logins
	maxCRIMessage = 16 << 20 // bytes, as the kubelet has it
	imageService  = "/runtime.v1.ImageService/"
	pullImage     = imageService + "PullImage"
)

// CRI is a proxy of containerd's CRI image service: kubelet talks to it
// (--image-service-endpoint), and it forwards all calls. It remembers with which login an
// image was pulled, once that has succeeded, until it is told of another or the process ends.
type CRI struct {
	conn    *grpc.ClientConn
	changed chan<- struct{}

	// mu guards pulled: the latest first, at most maxRemembered.
	mu     sync.Mutex
	pulled []pulled
}

// pulled is an image by its complete reference, and the login it was pulled with.
type pulled struct {
	image string
	login Login
}

// NewCRI returns a proxy in front of the socket at address, to which it connects at the first
// call. changed gets a signal when there is a login that was not known.
func NewCRI(address string, changed chan<- struct{}) (*CRI, error) {
	conn, err := grpc.NewClient("unix://"+address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxCRIMessage), grpc.MaxCallSendMsgSize(maxCRIMessage)))
	if err != nil {
		return nil, fmt.Errorf("connect to the CRI image service at %s: %w", address, err)
	}
	return &CRI{conn: conn, changed: changed}, nil
}

// Close ends the connection.
func (c *CRI) Close() error { return c.conn.Close() }

// ServerOptions make a gRPC server the proxy, beside what is registered with it.
func (c *CRI) ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{grpc.UnknownServiceHandler(c.handle), grpc.MaxRecvMsgSize(maxCRIMessage), grpc.MaxSendMsgSize(maxCRIMessage)}
}

// Name is "cri".
func (*CRI) Name() string { return "cri" }

// Login returns the login that the image, else another of its repository, was pulled with.
func (c *CRI) Login(_ context.Context, image string) (Login, error) {
	image = complete(image)
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, same := range []func(p pulled) bool{
		func(p pulled) bool { return p.image == image },
		func(p pulled) bool { return Repository(p.image) == Repository(image) },
	} {
		if i := slices.IndexFunc(c.pulled, same); i >= 0 {
			return c.pulled[i].login, nil
		}
	}
	return Login{}, ErrForgotten
}

// Refused does nothing: there is nobody to ask, until the kubelet pulls again.
func (*CRI) Refused(string) {}

func (c *CRI) remember(p pulled) {
	c.mu.Lock()
	i := slices.IndexFunc(c.pulled, func(o pulled) bool { return o.image == p.image })
	known := i >= 0 && c.pulled[i] == p
	if i >= 0 {
		c.pulled = slices.Delete(c.pulled, i, i+1)
	}
	c.pulled = slices.Insert(c.pulled, 0, p)
	if len(c.pulled) > maxRemembered {
		c.pulled = slices.Delete(c.pulled, maxRemembered, len(c.pulled))
	}
	c.mu.Unlock()
	if !known {
		signal(c.changed)
	}
}

// handle forwards a call. Messages are not decoded: an empty message keeps all fields of any
// other one as unknown, in their order, so also those that are newer than this program.
func (c *CRI) handle(_ any, from grpc.ServerStream) error {
	method, _ := grpc.MethodFromServerStream(from)
	if !strings.HasPrefix(method, imageService) {
		return status.Errorf(codes.Unimplemented, "%s is not served here, only the CRI image service is", method)
	}
	ctx, cancel := context.WithCancel(from.Context())
	defer cancel()
	if md, ok := metadata.FromIncomingContext(ctx); ok {
		ctx = metadata.NewOutgoingContext(ctx, md.Copy())
	}
	to, err := c.conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method)
	if err != nil {
		return err
	}
	first := make(chan []byte, 1)
	go forwardRequests(from, to, first) // until the call ends
	err = forwardAnswers(from, to)
	from.SetTrailer(to.Trailer())
	if err != nil || method != pullImage {
		return err
	}
	select {
	case request := <-first:
		if p := loginOf(request); !p.login.Empty() {
			c.remember(p)
		}
	default: // answered without having been asked
	}
	return nil
}

// forwardRequests forwards until the client has said everything, and tells the first message
// before it is sent. An error ends the call, which the other direction says.
func forwardRequests(from grpc.ServerStream, to grpc.ClientStream, first chan<- []byte) {
	for {
		var m emptypb.Empty
		if from.RecvMsg(&m) != nil {
			to.CloseSend()
			return
		}
		select {
		case first <- m.ProtoReflect().GetUnknown():
		default:
		}
		if to.SendMsg(&m) != nil {
			return
		}
	}
}

// forwardAnswers forwards until the service has said everything.
func forwardAnswers(from grpc.ServerStream, to grpc.ClientStream) error {
	header, err := to.Header()
	if err == nil && header != nil {
		err = from.SendHeader(header)
	}
	for err == nil {
		var m emptypb.Empty
		if err = to.RecvMsg(&m); err == nil {
			err = from.SendMsg(&m)
		}
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// loginOf returns image and login of a request, empty ones where it has none.
func loginOf(request []byte) pulled {
	r := parsePull(request)
	image := complete(r.image)
	if !r.auth.isFor(Host(image)) {
		return pulled{}
	}
	return pulled{image, r.auth.login()}
}

// complete returns a reference as containerd writes it; one that is none as it is.
func complete(image string) string {
	named, err := reference.ParseDockerRef(image)
	if err != nil {
		return image
	}
	return named.String()
}

// login is what containerd makes of it. An identity token, with which only a token service
// can do something, is none: the daemon could not use it.
func (a criAuth) login() Login {
	l := Login{Username: a.username, Password: a.password}
	switch {
	case a.username != "":
	case a.auth != "":
		l.Username, l.Password, _ = splitAuth(a.auth)
	default:
		l.Password = a.registryToken
	}
	return l
}

// isFor reports whether the login may be shown to a registry.
func (a criAuth) isFor(host string) bool {
	if a.server == "" {
		return true
	}
	server := a.server
	if u, err := url.Parse(a.server); err == nil && u.Host != "" {
		server = u.Host
	}
	return sameHost(Host(server), host)
}
